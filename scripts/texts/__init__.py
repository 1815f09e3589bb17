"""Training and test texts out of Debian packages, and chats made over them."""
