"""What a family of models is, as data: networks, text encoders, conditioning beside the text."""
