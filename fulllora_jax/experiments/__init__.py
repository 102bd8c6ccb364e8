"""Many runs side by side: comparisons, races, timings, costs on paper."""
