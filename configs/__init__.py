"""Ready configurations and tables, installed as package data of `specontext_vllm.configs`."""
