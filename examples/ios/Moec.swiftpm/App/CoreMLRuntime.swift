import CoreML
import Decoding
import Foundation

/// The two functions of a package in Core ML. They share weights and states, so nothing is copied between them.
final class CoreMLRuntime: Runtime {
    private let models: [String: MLModel]
    private let defaults: [String: MLFeatureValue]
    private var state: MLState

    init(package: URL, defaults: [String: [Float]]) async throws {
        let compiled = try await MLModel.compileModel(at: package)
        var models: [String: MLModel] = [:]
        for name in [Name.decode, Name.prefill] {
            let configuration = MLModelConfiguration()
            configuration.functionName = name
            models[name] = try await MLModel.load(contentsOf: compiled, configuration: configuration)
        }
        self.models = models
        self.defaults = defaults.mapValues { values in
            MLFeatureValue(shapedArray: MLShapedArray<Float>(scalars: values, shape: [values.count]))
        }
        state = models[Name.decode]!.makeState()
    }

    /// A new state holds zeros.
    func reset() {
        state = models[Name.decode]!.makeState()
    }

    func run(function: String, tokens: [Int32], positions: [Int32]) throws -> [Float] {
        var inputs = defaults
        inputs[Name.tokens] = MLFeatureValue(shapedArray: MLShapedArray(scalars: tokens, shape: [1, tokens.count]))
        inputs[Name.positions] = MLFeatureValue(shapedArray: MLShapedArray(scalars: positions, shape: [tokens.count]))
        let provider = try MLDictionaryFeatureProvider(dictionary: inputs)
        let outputs = try models[function]!.prediction(from: provider, using: state)
        // Logits [1, tokens, vocabulary] are fp16 in most artifacts.
        let logits = MLShapedArray<Float>(converting: outputs.featureValue(for: Name.logits)!.multiArrayValue!)
        return Array(logits.scalars.suffix(logits.shape[2]))
    }
}
