"""The version of dsllm. Files of the package read it here: importing the package itself would import upwards."""

__version__ = "0.1.0"
