plugins {
    id("com.android.application")
}

android {
    namespace = "moec.example"
    compileSdk = 36

    defaultConfig {
        applicationId = "moec.example"
        minSdk = 29
        targetSdk = 36
        versionCode = 1
        versionName = "1"
        ndk {
            abiFilters += "arm64-v8a"
        }
    }

    // Two apps from one Activity: `bundle` opens model.litertlm in LiteRT-LM, `model` opens model.tflite in LiteRT.
    flavorDimensions += "runtime"
    productFlavors {
        create("bundle") { dimension = "runtime" }
        create("model") { dimension = "runtime" }
    }

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}

dependencies {
    "bundleImplementation"("com.google.ai.edge.litertlm:litertlm-android:0.18.0")
    "bundleImplementation"("org.jetbrains.kotlinx:kotlinx-coroutines-android:1.11.0")

    "modelImplementation"(project(":decoding"))
    "modelImplementation"("com.google.ai.edge.litert:litert:2.2.0")
    "modelImplementation"("ai.djl.huggingface:tokenizers:0.33.0")
    "modelRuntimeOnly"("ai.djl.android:tokenizer-native:0.33.0")
}
