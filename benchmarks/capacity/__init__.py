"""Case `capacity`: more context in flight than the GPU holds, two tiers against stock vLLM with the
same memory on the GPU; and case `overlap`: what offloading costs where it is not needed.
"""
