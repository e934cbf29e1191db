// swift-tools-version: 6.0
import PackageDescription

// Foundation only: it builds on any system that has Swift.
let package = Package(
    name: "Decoding",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [.library(name: "Decoding", targets: ["Decoding"])],
    targets: [.target(name: "Decoding")]
)
