"""The folders in which tests of training start whole jobs."""

from tests.helpers.job_folder import folder, prepared

__all__ = ["folder", "prepared"]
