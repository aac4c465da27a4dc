"""BEV perception: a detector that sees six cameras from above, made small for a car's domain controller."""
