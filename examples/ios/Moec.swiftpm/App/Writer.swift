import Decoding
import Foundation
import Tokenizers

/// An open artifact: the folder that `moec export --target coreml` writes. Each prompt starts anew.
actor Writer {
    private let artifact: Artifact
    private let decoder: StatefulDecoder
    private let tokenizer: any Tokenizer
    private let maxTokens = 256

    init(folder: URL) async throws {
        artifact = try Artifact(folder: folder)
        tokenizer = try await AutoTokenizer.from(modelFolder: folder)
        let package = folder.appending(path: Name.package)
        let runtime = try await CoreMLRuntime(package: package, defaults: artifact.defaults)
        decoder = StatefulDecoder(artifact: artifact, runtime: runtime)
    }

    /// The pieces of an answer, each as soon as it is known.
    nonisolated func write(_ prompt: String) -> AsyncThrowingStream<String, Error> {
        AsyncThrowingStream { pieces in
            Task {
                do {
                    try await self.answer(prompt) { pieces.yield($0) }
                    pieces.finish()
                } catch {
                    pieces.finish(throwing: error)
                }
            }
        }
    }

    private func answer(_ prompt: String, onText: @Sendable (String) -> Void) throws {
        let tokens =
            tokenizer.hasChatTemplate
            ? try tokenizer.applyChatTemplate(messages: [["role": "user", "content": prompt]])
            : tokenizer.encode(text: prompt)
        try generate(
            artifact: artifact,
            decoder: decoder,
            prompt: tokens,
            decode: { [tokenizer] in tokenizer.decode(tokens: $0, skipSpecialTokens: true) },
            maxTokens: maxTokens,
            sampler: Sampler(temperature: 0.8, topP: 0.95),
            onText: onText
        )
    }
}
