"""Puts this folder on the path, so that tests may import the helpers beside this file; busy machines get no deadlines."""

from hypothesis import settings

settings.register_profile("rftt", deadline=None, max_examples=50)
settings.load_profile("rftt")
