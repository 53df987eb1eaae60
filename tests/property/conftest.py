from hypothesis import settings

# Machines that share their cores miss deadlines through no fault of ours; pytest's timeout bounds a test.
settings.register_profile("podloom", deadline=None, print_blob=True)
settings.load_profile("podloom")
