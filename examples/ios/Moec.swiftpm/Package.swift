// swift-tools-version: 6.0
import AppleProductTypes
import PackageDescription

let package = Package(
    name: "Moec",
    platforms: [.iOS("18.0")],
    products: [
        .iOSApplication(
            name: "Moec",
            targets: ["App"],
            bundleIdentifier: "moec.example",
            displayVersion: "1.0",
            bundleVersion: "1",
            appIcon: .placeholder(icon: .box),
            accentColor: .presetColor(.blue),
            supportedDeviceFamilies: [.phone, .pad],
            supportedInterfaceOrientations: [.portrait, .landscapeLeft, .landscapeRight]
        )
    ],
    dependencies: [
        .package(path: "../Decoding"),
        .package(url: "https://github.com/huggingface/swift-transformers", exact: "1.3.3"),
    ],
    targets: [
        .executableTarget(
            name: "App",
            dependencies: ["Decoding", .product(name: "Tokenizers", package: "swift-transformers")],
            path: "App"
        )
    ]
)
