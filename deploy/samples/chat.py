"""Ask a package a question, with onnxruntime-genai alone: python chat.py DIR "What is ONNX?" """

import json
import sys

import onnxruntime_genai as og

model = og.Model(sys.argv[1])
tokenizer = og.Tokenizer(model)
messages = json.dumps([{"role": "user", "content": sys.argv[2]}])
prompt = tokenizer.encode(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=len(prompt) + 200, do_sample=False)
generator, stream = og.Generator(model, parameters), tokenizer.create_stream()
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
    print(stream.decode(generator.get_next_tokens()[0]), end="", flush=True)
print()
