"""`python -m specontext_vllm.cli`, which launchers of several processes need."""

from specontext_vllm.cli import app

app()
