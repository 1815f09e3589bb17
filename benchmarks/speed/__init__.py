"""Case `speed`: specontext against every alternative, in parts that can be run, and run
again, one by one.
"""
