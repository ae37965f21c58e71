"""Ask a package that is served, with OpenAI's client: python client.py "What is ONNX?"

    qwen-onnx serve DIR                             the server, here on port 8000
    pip install openai                              the client; any other of OpenAI's protocol does, too
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python client.py "What is ONNX?"

A server with keys wants one of them as OPENAI_API_KEY.
"""

import sys

from openai import OpenAI

client = OpenAI()  # takes both variables
model = client.models.list().data[0].id
messages = [{"role": "user", "content": sys.argv[1]}]
answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=200, stream=True)
for chunk in answer:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
