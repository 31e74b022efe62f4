"""The pipeline from filled slots to chunks of an image: pool, spill file, encoder, compression levels."""
