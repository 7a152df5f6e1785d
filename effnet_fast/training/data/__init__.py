"""From folders, tables and shards to batches of pixels: decoding, crops, order, augmentation."""
