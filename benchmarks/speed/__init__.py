"""Case `speed`: specontext against every alternative, in parts that run, and run again, one by one."""
