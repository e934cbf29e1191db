/// A runtime in which the model is open. It keeps the states from call to call.
public protocol Runtime {
    /// Fills the states with zeros.
    func reset() throws

    /// Calls a function with the tokens and their slots in the cache, and returns the logits of the last token.
    func run(function: String, tokens: [Int32], positions: [Int32]) throws -> [Float]
}

public enum DecodingError: Error {
    case tooLong(tokens: Int, context: Int)
}

/// Feeds tokens to a model in calls that it has functions for.
///
/// There is no mask and no padding: a token attends to the slots up to its own position, and a piece of a prompt may
/// have any length up to the chunk.
public final class StatefulDecoder {
    private let artifact: Artifact
    private let runtime: any Runtime
    /// Tokens in the states.
    public private(set) var length = 0

    public init(artifact: Artifact, runtime: any Runtime) {
        self.artifact = artifact
        self.runtime = runtime
    }

    /// Starts a new text.
    public func reset() throws {
        try runtime.reset()
        length = 0
    }

    /// Feeds tokens, at least one, and returns the logits after the last.
    public func feed(_ tokens: [Int]) throws -> [Float] {
        guard length + tokens.count <= artifact.context else {
            throw DecodingError.tooLong(tokens: length + tokens.count, context: artifact.context)
        }
        var logits: [Float] = []
        for start in stride(from: 0, to: tokens.count, by: artifact.chunk) {
            let piece = tokens[start..<min(start + artifact.chunk, tokens.count)].map { Int32($0) }
            let positions = (length..<length + piece.count).map { Int32($0) }
            let function = piece.count == 1 ? Name.decode : Name.prefill
            logits = try runtime.run(function: function, tokens: piece, positions: positions)
            length += piece.count
        }
        return logits
    }
}
