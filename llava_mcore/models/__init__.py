"""The partitioned model: vision tower, projector, splice by index, decoder. Groups are passed in; nothing here knows the data."""
