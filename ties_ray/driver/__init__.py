"""A merge under way, on the side that hands out work: schedule, dispatch, resume and publication."""
