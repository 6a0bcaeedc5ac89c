"""Text generation: prompts -> a queue over the slots of a KV cache -> sampled tokens -> text."""
