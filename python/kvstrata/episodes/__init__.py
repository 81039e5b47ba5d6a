"""Conversations far longer than the cache: the text cut into windows, windows into topics, a question sent to its topic,
under a limit of bytes."""

from kvstrata.episodes.answer import Answer, ConversationReport, Episode
from kvstrata.episodes.cluster import Clusters, cluster
from kvstrata.episodes.conversation import Conversation
from kvstrata.episodes.embed import Embedder, Fitted, InputEmbedding, MiniLM, SentenceModel, auto
from kvstrata.episodes.model import Attending, ChatModel
from kvstrata.episodes.picture import picture
from kvstrata.episodes.represent import fit, represent
from kvstrata.episodes.route import Route, Router
from kvstrata.episodes.saved import load_conversation, save_conversation
from kvstrata.episodes.segment import Turn, Utterance, Window, line, segment, turns_of, utterances
from kvstrata.episodes.sensitivity import sensitivity
from kvstrata.episodes.topics import Placed, Topics

__all__ = [
    "Answer",
    "Attending",
    "ChatModel",
    "Clusters",
    "Conversation",
    "ConversationReport",
    "Embedder",
    "Episode",
    "Fitted",
    "InputEmbedding",
    "MiniLM",
    "Placed",
    "Route",
    "Router",
    "SentenceModel",
    "Topics",
    "Turn",
    "Utterance",
    "Window",
    "auto",
    "cluster",
    "fit",
    "line",
    "load_conversation",
    "picture",
    "represent",
    "save_conversation",
    "segment",
    "sensitivity",
    "turns_of",
    "utterances",
]
