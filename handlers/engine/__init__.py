"""From an admitted request to its answer: admission, grouping, the loop on the device."""
