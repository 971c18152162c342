//! KMIP, the standard protocol of key servers.

pub mod ttlv;
