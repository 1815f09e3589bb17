"""Case `soak`: a real server kept full for long, with requests that come, go and are given up;
nothing wrong, nothing lost, no growth.
"""
