"""Steps that merge by ties_ray, for the environments of workflow engines: they need neither ties_ray, torch nor ray."""
