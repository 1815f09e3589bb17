"""The plugin's settings: one validated model of ``additional_config["specontext"]``."""

from specontext_vllm.config.errors import CONFIG_KEY, ConfigError
from specontext_vllm.config.fields import AttentionProviderName, HeadKeyDtype, Loading, Mode
from specontext_vllm.config.pages import PAGE_SIZE, pages_for
from specontext_vllm.config.settings import SpeContextConfig

__all__ = [
    "CONFIG_KEY",
    "PAGE_SIZE",
    "AttentionProviderName",
    "ConfigError",
    "HeadKeyDtype",
    "Loading",
    "Mode",
    "SpeContextConfig",
    "pages_for",
]
