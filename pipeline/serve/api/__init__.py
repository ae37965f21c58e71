"""OpenAI's API: requests read strictly, answers and events as its clients expect them."""
