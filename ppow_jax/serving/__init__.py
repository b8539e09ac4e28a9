"""An endpoint with the OpenAI API: request bodies, the engine of slots, replies, metrics, and the chat page."""
