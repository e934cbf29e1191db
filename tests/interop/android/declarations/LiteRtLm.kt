package com.google.ai.edge.litertlm

import kotlinx.coroutines.flow.Flow

data class EngineConfig(val modelPath: String, val maxNumTokens: Int? = null, val cacheDir: String? = null)

class ConversationConfig

class Message

class Conversation : AutoCloseable {
    fun sendMessageAsync(text: String, extraContext: Map<String, Any> = emptyMap()): Flow<Message> = TODO()

    override fun close() = Unit
}

class Engine(val engineConfig: EngineConfig) : AutoCloseable {
    fun initialize(): Unit = TODO()

    fun createConversation(conversationConfig: ConversationConfig = ConversationConfig()): Conversation = TODO()

    override fun close() = Unit
}
