"""How many examples hypothesis tries: a few that are always the same, or many for `make fuzz`."""

from hypothesis import settings

settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True, database=None)
settings.register_profile("fuzz", settings.get_profile("quick"), max_examples=1500, derandomize=False)
settings.load_profile("quick")
