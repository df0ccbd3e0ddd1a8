"""What runs above an engine, whichever kind it is: sessions, KV caches, sampling, generation."""
