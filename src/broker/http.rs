//! One HTTP/1.1 request of a connection: httparse parses the head, and this module limits time and size.

use std::io::{self, Read, Write};

use serde::Serialize;

/// The longest head, and the most headers in it.
const HEAD_LIMIT: usize = 8 << 10;
const MAX_HEADERS: usize = 64;
/// The longest body: evidence has 4 KiB, and an enrolment as much, with a certificate of 8.
const BODY_LIMIT: usize = 32 << 10;

/// What is asked.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) method: String,
    /// Without the slash before it.
    pub(super) path: String,
    pub(super) cookie: Option<String>,
    pub(super) authorization: Option<String>,
    pub(super) body: Vec<u8>,
}

/// Why nothing is.
#[derive(Debug)]
pub(super) enum ReadError {
    /// The connection.
    Io(io::Error),
    /// It is no request that is answered with more than this status.
    Status(u16),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Reads one request.
pub(super) fn read(stream: &mut impl Read) -> Result<Request, ReadError> {
    let mut bytes = Vec::new();
    let (mut request, length, body_at) = loop {
        if let Some(head) = head(&bytes)? {
            break head;
        }
        if bytes.len() >= HEAD_LIMIT {
            return Err(ReadError::Status(431));
        }
        more(stream, &mut bytes)?;
    };
    if length > BODY_LIMIT {
        return Err(ReadError::Status(413));
    }
    while bytes.len() - body_at < length {
        more(stream, &mut bytes)?;
    }
    // A second request behind it is not answered.
    request.body = bytes[body_at..body_at + length].to_vec();
    Ok(request)
}

fn more(stream: &mut impl Read, bytes: &mut Vec<u8>) -> Result<(), ReadError> {
    let mut piece = [0; 2048];
    match stream.read(&mut piece)? {
        0 => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
        read => {
            bytes.extend_from_slice(&piece[..read]);
            Ok(())
        }
    }
}

/// The request, the length of its body, and where that begins; none, if more has to be read.
fn head(bytes: &[u8]) -> Result<Option<(Request, usize, usize)>, ReadError> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let body_at = match parsed.parse(bytes) {
        Ok(httparse::Status::Complete(at)) => at,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(ReadError::Status(400)),
    };
    let mut request = Request {
        method: parsed.method.unwrap_or_default().to_owned(),
        path: parsed.path.unwrap_or_default().trim_start_matches('/').to_owned(),
        cookie: None,
        authorization: None,
        body: Vec::new(),
    };
    let mut length = None;
    for header in parsed.headers.iter() {
        let text = || std::str::from_utf8(header.value).map_err(|_| ReadError::Status(400));
        match header.name.to_ascii_lowercase().as_str() {
            "cookie" => request.cookie = Some(text()?.to_owned()),
            "authorization" => request.authorization = Some(text()?.to_owned()),
            // Two lengths are none.
            "content-length" if length.is_none() && text()?.bytes().all(|b| b.is_ascii_digit()) => {
                length = Some(text()?.parse().map_err(|_| ReadError::Status(413))?);
            }
            "content-length" => return Err(ReadError::Status(400)),
            "transfer-encoding" => return Err(ReadError::Status(411)),
            _ => {}
        }
    }
    Ok(Some((request, length.unwrap_or(0), body_at)))
}

/// What is answered.
#[derive(Debug)]
pub(super) struct Response {
    status: u16,
    cookie: Option<String>,
    json: Vec<u8>,
}

impl Response {
    pub(super) fn new(status: u16, body: &impl Serialize) -> Self {
        Self {
            status,
            cookie: None,
            json: serde_json::to_vec(body).expect("texts are JSON"),
        }
    }

    pub(super) fn empty(status: u16) -> Self {
        Self {
            status,
            cookie: None,
            json: Vec::new(),
        }
    }

    pub(super) fn with_cookie(mut self, name: &str, value: &str) -> Self {
        self.cookie = Some(format!("{name}={value}"));
        self
    }

    pub(super) fn write(&self, stream: &mut impl Write) -> io::Result<()> {
        let cookie = match &self.cookie {
            Some(cookie) => format!("Set-Cookie: {cookie}; Secure; HttpOnly; Path=/kbs\r\n"),
            None => String::new(),
        };
        // The reason after the status means nothing to anybody.
        let head = format!(
            "HTTP/1.1 {} -\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n{cookie}\r\n",
            self.status,
            self.json.len()
        );
        stream.write_all(&[head.as_bytes(), &self.json].concat())?;
        stream.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(bytes: &[u8]) -> u16 {
        match read(&mut &bytes[..]) {
            Err(ReadError::Status(status)) => status,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn requests_are_read_with_their_bodies() {
        let bytes =
            b"POST /kbs/v0/auth HTTP/1.1\r\nHost: b\r\ncookie: a=b\r\nContent-Length: 3\r\n\r\n{} tail";
        let request = read(&mut &bytes[..]).unwrap();
        assert_eq!(
            (request.method.as_str(), request.path.as_str()),
            ("POST", "kbs/v0/auth")
        );
        assert_eq!(
            (request.cookie.as_deref(), &request.body[..]),
            (Some("a=b"), &b"{} "[..])
        );
        for len in 0..bytes.len() - 4 {
            assert!(matches!(read(&mut &bytes[..len]), Err(ReadError::Io(_))), "{len}");
        }
    }

    #[test]
    fn what_is_too_large_or_not_plain_is_refused() {
        let with = |header: &str| status(format!("POST / HTTP/1.1\r\n{header}\r\n\r\n").as_bytes());
        assert_eq!(with("Content-Length: 40000"), 413);
        assert_eq!(with("Content-Length: 99999999999999999999999"), 413);
        assert_eq!(with("Content-Length: -1"), 400);
        assert_eq!(with("Content-Length: 1\r\nContent-Length: 2"), 400);
        assert_eq!(with("Transfer-Encoding: chunked"), 411);
        assert_eq!(status(b"\x16\x03\x01\x00"), 400);
        let endless = format!("GET / HTTP/1.1\r\nA: {}", "a".repeat(2 * HEAD_LIMIT));
        assert_eq!(status(endless.as_bytes()), 431);
    }
}
