// Keeps a layer that has no source file yet a valid target.
