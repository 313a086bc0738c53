"""Property tests are judged by what they find, not by how long an example takes: machines that test are busy."""

from hypothesis import settings

settings.register_profile("wattbridge", deadline=None)
settings.load_profile("wattbridge")
