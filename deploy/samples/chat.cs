// Ask a package a question, with onnxruntime-genai alone.
//
//   dotnet new console -o chat && cp chat.cs chat/Program.cs && cd chat
//   dotnet add package Microsoft.ML.OnnxRuntimeGenAI --version 0.14.1
//   dotnet run -- DIR "What is ONNX?"
using System.Text.Json;
using Microsoft.ML.OnnxRuntimeGenAI;

using var model = new Model(args[0]);
using var tokenizer = new Tokenizer(model);
var messages = JsonSerializer.Serialize(new[] { new { role = "user", content = args[1] } });
using var prompt = tokenizer.Encode(tokenizer.ApplyChatTemplate("", messages, "", true));
using var parameters = new GeneratorParams(model);
parameters.SetSearchOption("max_length", prompt[0].Length + 200);
parameters.SetSearchOption("do_sample", false);
using var generator = new Generator(model, parameters);
generator.AppendTokenSequences(prompt);
using var stream = tokenizer.CreateStream();
while (!generator.IsDone())
{
    generator.GenerateNextToken();
    Console.Write(stream.Decode(generator.GetNextTokens()[0]));
}
Console.WriteLine();
