"""What a converted model is: its record, its guards, its classifier and its size."""
