import SwiftUI
import UniformTypeIdentifiers

@main
struct MoecApp: App {
    var body: some Scene {
        WindowGroup { ContentView() }
    }
}

/// A button that opens an artifact's folder, a prompt, and the answer as it is written.
struct ContentView: View {
    @State private var writer: Writer?
    @State private var prompt = ""
    @State private var answer = ""
    @State private var choosing = false
    @State private var busy = false

    var body: some View {
        VStack {
            Button("Open a model ...") { choosing = true }
                .disabled(busy)
            TextField("Prompt", text: $prompt, axis: .vertical)
                .textFieldStyle(.roundedBorder)
            Button("Write") { Task { await write() } }
                .buttonStyle(.borderedProminent)
                .disabled(writer == nil || busy || prompt.isEmpty)
            ScrollView {
                Text(answer)
                    .textSelection(.enabled)
                    .frame(maxWidth: .infinity, alignment: .leading)
            }
        }
        .padding()
        .fileImporter(isPresented: $choosing, allowedContentTypes: [.folder]) { chosen in
            Task { await open(chosen) }
        }
    }

    private func open(_ chosen: Result<URL, Error>) async {
        busy = true
        defer { busy = false }
        answer = "Compiling the model for this device ..."
        do {
            let folder = try chosen.get()
            // The folder belongs to another app, such as Files.
            let allowed = folder.startAccessingSecurityScopedResource()
            defer { if allowed { folder.stopAccessingSecurityScopedResource() } }
            writer = try await Writer(folder: folder)
            answer = ""
        } catch {
            answer = error.localizedDescription
        }
    }

    private func write() async {
        guard let writer else { return }
        busy = true
        defer { busy = false }
        answer = ""
        do {
            for try await piece in writer.write(prompt) { answer += piece }
        } catch {
            answer += "\n\(error.localizedDescription)"
        }
    }
}
