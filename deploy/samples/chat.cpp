// Ask a package a question, with onnxruntime-genai alone: chat DIR "What is ONNX?"
//
// ort_genai.h and ort_genai_c.h are in each release of onnxruntime-genai (include/), and so are the libraries. Those of the
// Python wheels do as well, linked by their path since their names have no version of their own:
//
//   GENAI=$(python -c "import onnxruntime_genai as m; print(m.__path__[0])")
//   ORT=$(python -c "import onnxruntime as m; print(m.__path__[0] + '/capi')")
//   g++ -std=c++20 -O2 -I HEADERS chat.cpp $GENAI/libonnxruntime-genai.so -Wl,-rpath,$GENAI -o chat
//   ORT_LIB_PATH=$(ls $ORT/libonnxruntime.so.*) ./chat DIR "What is ONNX?"
#include <exception>
#include <iostream>
#include <string>

#include "ort_genai.h"

// A JSON string of any UTF-8 text.
static std::string quoted(const std::string& text) {
    std::string out = "\"";
    const char* digits = "0123456789abcdef";
    for (unsigned char c : text) {
        if (c == '"' || c == '\\') {
            out += {'\\', static_cast<char>(c)};
        } else if (c < 0x20) {
            out += std::string("\\u00") + digits[c >> 4] + digits[c & 15];
        } else {
            out += static_cast<char>(c);
        }
    }
    return out + "\"";
}

int main(int count, char** arguments) try {
    if (count != 3) {
        std::cerr << "usage: chat DIR QUESTION\n";
        return 2;
    }
    OgaHandle handle;  // shuts the library down at the end
    auto model = OgaModel::Create(arguments[1]);
    auto tokenizer = OgaTokenizer::Create(*model);
    std::string messages = R"([{"role": "user", "content": )" + quoted(arguments[2]) + "}]";
    auto prompt = OgaSequences::Create();
    tokenizer->Encode(tokenizer->ApplyChatTemplate("", messages.c_str(), "", true), *prompt);
    auto parameters = OgaGeneratorParams::Create(*model);
    parameters->SetSearchOption("max_length", static_cast<double>(prompt->SequenceCount(0)) + 200);
    parameters->SetSearchOptionBool("do_sample", false);
    auto generator = OgaGenerator::Create(*model, *parameters);
    generator->AppendTokenSequences(*prompt);
    auto stream = OgaTokenizerStream::Create(*tokenizer);
    while (!generator->IsDone()) {
        generator->GenerateNextToken();
        std::cout << stream->Decode(generator->GetNextTokens()[0]) << std::flush;
    }
    std::cout << "\n";
} catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
}
