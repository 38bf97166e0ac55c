"""Objects to bytes and back: codecs, specs, arrays, tensors. Knows where bytes go, not what state a slot is in."""
