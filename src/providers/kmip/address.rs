//! The address of a KMIP server, as the operator writes it: `HOST[:PORT]`, with an IPv6 address in brackets if a port follows.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use rustls::pki_types::ServerName;

/// What KMIP is assigned (KMIP Profiles, section 3).
const DEFAULT_PORT: u16 = 5696;

/// A host, by name or IP address, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    host: String,
    port: u16,
}

/// A text that is no address.
#[derive(Debug, thiserror::Error)]
#[error("write HOST, HOST:PORT, or an IPv6 address as in [2001:db8::1]:5696")]
pub(super) struct NoAddress;

impl Address {
    /// A name, or an IP address without brackets.
    pub(super) fn host(&self) -> &str {
        &self.host
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for Address {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let (host, port) = split(text).ok_or(NoAddress)?;
        // Of a form that a certificate can be checked against.
        match ServerName::try_from(host) {
            Ok(_) if port != 0 => Ok(Self {
                host: host.to_owned(),
                port,
            }),
            _ => Err(NoAddress),
        }
    }
}

fn split(text: &str) -> Option<(&str, u16)> {
    if text.parse::<Ipv6Addr>().is_ok() {
        return Some((text, DEFAULT_PORT));
    }
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            host.parse::<Ipv6Addr>().ok()?;
            match port {
                "" => (host, None),
                port => (host, Some(port.strip_prefix(':')?)),
            }
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    match port {
        Some(port) => Some((host, port.parse().ok()?)),
        None => Some((host, DEFAULT_PORT)),
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.parse() {
            Ok(IpAddr::V6(host)) => write!(f, "[{host}]:{}", self.port),
            _ => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_shown() {
        for (text, host, shown) in [
            ("kms1", "kms1", "kms1:5696"),
            (
                "kms1.example.com:1234",
                "kms1.example.com",
                "kms1.example.com:1234",
            ),
            ("192.0.2.7", "192.0.2.7", "192.0.2.7:5696"),
            ("192.0.2.7:99", "192.0.2.7", "192.0.2.7:99"),
            ("2001:db8::1", "2001:db8::1", "[2001:db8::1]:5696"),
            ("[2001:db8::1]", "2001:db8::1", "[2001:db8::1]:5696"),
            ("[2001:db8::1]:99", "2001:db8::1", "[2001:db8::1]:99"),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!((address.host(), address.to_string().as_str()), (host, shown));
        }
        for text in [
            "",
            ":5696",
            "kms1:",
            "kms1:0",
            "kms1:65536",
            "kms1:x",
            "[::1",
            "[kms1]:1",
            "a b",
            "https://kms1",
            "[::1]5",
        ] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
