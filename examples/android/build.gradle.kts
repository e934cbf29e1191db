// The Android plugin compiles Kotlin itself, with the compiler of this version.
plugins {
    id("com.android.application") version "9.4.1" apply false
    id("org.jetbrains.kotlin.jvm") version "2.4.20" apply false
}
