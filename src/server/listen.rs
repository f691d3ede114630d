//! Listening sockets of our own. Pingora's listeners panic when a port is taken, cannot say which port 0 became, and close only
//! with the process.

use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use pingora::apps::ServerApp;
use pingora::protocols::l4::stream::Stream as L4Stream;
use pingora::protocols::{GetSocketDigest, SocketDigest, Stream};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, watch};

use super::ServerError;

/// Connections that the kernel keeps until they are accepted: a burst of clients that reconnect.
const BACKLOG: u32 = 4096;

pub fn bind(address: SocketAddr) -> Result<TcpListener, ServerError> {
    let bound = (|| {
        let socket = if address.is_ipv6() { TcpSocket::new_v6()? } else { TcpSocket::new_v4()? };
        socket.set_reuseaddr(true)?; // a restart need not wait for TIME_WAIT
        socket.bind(address)?;
        socket.listen(BACKLOG)
    })();
    bound.map_err(|e| ServerError::Runtime(format!("cannot listen on {address}: {e}; is another process using it?")))
}

/// Accepts until `closing` and hands each connection to a Pingora app; what runs goes on.
pub async fn accept<A: ServerApp + Send + Sync + 'static>(
    listener: TcpListener,
    app: Arc<A>,
    closing: watch::Receiver<bool>,
    most: usize,
    turned_away: impl Fn(),
) {
    let stop = closing.clone();
    let serve = move |socket: TcpStream, _| {
        let fd = socket.as_raw_fd();
        let mut stream = L4Stream::from(socket);
        stream.set_socket_digest(SocketDigest::from_raw_fd(fd));
        let (app, closing) = (Arc::clone(&app), closing.clone());
        async move {
            let mut next: Option<Stream> = Some(Box::new(stream));
            while let Some(stream) = next {
                next = app.process_new(stream, &closing).await;
            }
        }
    };
    accept_each(listener, stop, most, turned_away, serve).await;
}

/// Accepts until `closing`; what runs goes on. At most `most` connections at once: `turned_away` is told of each one more.
pub async fn accept_each<F: Future<Output = ()> + Send + 'static>(
    listener: TcpListener,
    mut closing: watch::Receiver<bool>,
    most: usize,
    turned_away: impl Fn(),
    serve: impl Fn(TcpStream, SocketAddr) -> F,
) {
    let places = Arc::new(Semaphore::new(most));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = closing.wait_for(|closed| *closed) => return,
        };
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(e) => {
                // Too many open files, mostly: it would fail again at once, so others get time to close theirs.
                log::warn!("cannot accept a connection: {e}");
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            turned_away(); // dropped, which closes it: there is no room to say more
            continue;
        };
        let _ = socket.set_nodelay(true); // 40 ms steps are the classic fault of gateways (traps, Pingora 18)
        let served = serve(socket, peer);
        tokio::spawn(async move {
            served.await;
            drop(place);
        });
    }
}
