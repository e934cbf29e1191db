import Foundation

/// Chooses the next token: the most likely one at temperature 0, else a draw among those that reach `topP`.
public struct Sampler: Sendable {
    private let temperature: Double
    private let topP: Double

    public init(temperature: Double = 0, topP: Double = 1) {
        self.temperature = temperature
        self.topP = topP
    }

    public func choose(_ logits: [Float]) -> Int {
        guard temperature > 0 else { return logits.indices.max { logits[$0] < logits[$1] }! }
        let order = logits.indices.sorted { logits[$0] > logits[$1] }
        let weights = order.map { exp(Double(logits[$0] - logits[order[0]]) / temperature) }
        let enough = topP * weights.reduce(0, +)
        var sums: [Double] = []
        for weight in weights {
            sums.append((sums.last ?? 0) + weight)
            if sums[sums.count - 1] >= enough { break }
        }
        let drawn = Double.random(in: 0..<sums[sums.count - 1])
        return order[sums.firstIndex { $0 > drawn } ?? 0]
    }
}

/// Turns tokens into text one by one.
///
/// A token is decoded together with those before it, since decoders drop a space at the start of a text, and waits
/// until its character is complete.
public struct TextStream {
    /// Longest character of UTF-8 in bytes, and so in tokens.
    private static let longestCharacter = 4

    private let decode: ([Int]) -> String
    private var tokens: [Int]
    private var start = 0
    private var done: Int

    /// - Parameters:
    ///   - prompt: The tokens before the first added one.
    ///   - decode: Text of tokens, without special ones.
    public init(prompt: [Int], decode: @escaping ([Int]) -> String) {
        self.decode = decode
        tokens = Array(prompt.suffix(2 * Self.longestCharacter))
        done = tokens.count
    }

    /// The text that a token completes; empty where its character is not complete yet.
    public mutating func add(_ token: Int) -> String {
        tokens.append(token)
        let text = rest()
        let complete = !text.isEmpty && text.unicodeScalars.last != "\u{FFFD}"
        if !complete && tokens.count - done < Self.longestCharacter { return "" }
        start = done
        done = tokens.count
        return text
    }

    /// What is left at the end.
    public func end() -> String { done < tokens.count ? rest() : "" }

    private func rest() -> String {
        let before = decode(Array(tokens[start..<done])).unicodeScalars
        let all = decode(Array(tokens[start...])).unicodeScalars
        let same = zip(before, all).prefix { $0 == $1 }.count
        return String(String.UnicodeScalarView(all.dropFirst(same)))
    }
}

/// Continues a prompt by up to `maxTokens` tokens and gives each piece of text to `onText` as soon as it is known.
public func generate(
    artifact: Artifact,
    decoder: StatefulDecoder,
    prompt: [Int],
    decode: @escaping ([Int]) -> String,
    maxTokens: Int,
    sampler: Sampler = Sampler(),
    onText: (String) -> Void
) throws {
    var text = TextStream(prompt: prompt, decode: decode)
    try decoder.reset()
    var logits = try decoder.feed(prompt)
    for count in 1...maxTokens {
        let token = sampler.choose(logits)
        if artifact.endTokens.contains(token) { break }
        onText(text.add(token))
        if count == maxTokens || decoder.length == artifact.context { break }
        logits = try decoder.feed([token])
    }
    onText(text.end())
}
