"""What talks to a server over HTTP: a load generator and a terminal chat. Any OpenAI-compatible server will do."""
