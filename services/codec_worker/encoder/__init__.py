"""HeartCodec's encoder: recordings → the codes from which the codec, and the language model, go on."""
