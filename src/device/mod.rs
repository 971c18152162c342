//! What the guest sees: virtio-blk over vhost-user.
