import Foundation

/// Names in the CoreML artifacts of moec.
public enum Name {
    public static let package = "model.mlpackage"
    /// The function for one token, which skips experts, and the one for a piece of a prompt.
    public static let decode = "decode"
    public static let prefill = "prefill"
    public static let tokens = "input_ids"
    public static let positions = "cache_position"
    public static let logits = "logits"
}

/// What moec.json and the model's configs say of an artifact.
public struct Artifact: Sendable {
    /// Tokens that the states have room for, prompt and answer together.
    public let context: Int
    /// Largest number of tokens of one call of `prefill`.
    public let chunk: Int
    /// Values of inputs that a routing policy added, such as `routing_budget`.
    public let defaults: [String: [Float]]
    /// Tokens that end an answer.
    public let endTokens: Set<Int>

    /// Reads moec.json, generation_config.json and config.json.
    public init(folder: URL) throws {
        let facts = try Self.read(Manifest.self, folder.appending(path: "moec.json")).facts
        context = facts.context
        chunk = facts.prefill_chunk
        defaults = facts.inputs ?? [:]
        endTokens = try Self.endTokens(folder)
    }

    /// As in transformers: if generation_config.json names any token, only its tokens count.
    private static func endTokens(_ folder: URL) throws -> Set<Int> {
        for name in ["generation_config.json", "config.json"] {
            let file = folder.appending(path: name)
            guard FileManager.default.fileExists(atPath: file.path(percentEncoded: false)) else { continue }
            let config = try read(Config.self, file)
            for tokens in [config.eos_token_id, config.text_config?.eos_token_id] {
                if let tokens, !tokens.values.isEmpty { return tokens.values }
            }
        }
        return []
    }

    private static func read<Value: Decodable>(_ type: Value.Type, _ file: URL) throws -> Value {
        try JSONDecoder().decode(type, from: Data(contentsOf: file))
    }
}

private struct Manifest: Decodable {
    struct Facts: Decodable {
        let context: Int
        let prefill_chunk: Int
        let inputs: [String: [Float]]?
    }

    let facts: Facts
}

private struct Config: Decodable {
    struct Nested: Decodable {
        let eos_token_id: Tokens?
    }

    let eos_token_id: Tokens?
    let text_config: Nested?
}

/// One token or several.
private struct Tokens: Decodable {
    let values: Set<Int>

    init(from decoder: any Decoder) throws {
        let container = try decoder.singleValueContainer()
        if let one = try? container.decode(Int.self) {
            values = [one]
        } else {
            values = Set(try container.decode([Int].self))
        }
    }
}
