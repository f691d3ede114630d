//! Signals and drain. Pingora's own SIGTERM sleeps 300 s whatever happens, and tasks that it ends never settle (traps, Pingora 8).

use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::ServerError;
use crate::live::Cut;
use crate::site::Site;

/// After the cut: a stream needs no more than a moment to end with its error frame.
const AFTER_CUT: Duration = Duration::from_secs(3);
/// For the last records.
const LAST_RECORDS: Duration = Duration::from_secs(5);
/// For a sink that is up to take what it does not have yet.
pub const LAST_BATCHES: Duration = Duration::from_secs(3);

/// Listens for the signals from now on, so that none that comes after the start was told kills the process; the future ends at the
/// first.
pub fn asked_to_stop(mut stop: watch::Receiver<bool>) -> Result<impl Future<Output = ()> + use<>, ServerError> {
    let failed = |e: std::io::Error| ServerError::Runtime(format!("cannot listen for signals: {e}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => log::info!("SIGTERM: stopping"),
            _ = interrupt.recv() => log::info!("SIGINT: stopping"),
            _ = stop.wait_for(|stop| *stop) => {}
        }
    })
}

/// No new connections; what runs may finish within `within`, then it is cut with an error frame; every record is written, and the audit closed.
pub async fn drain(site: &Arc<Site>, within: Duration, close_public: watch::Sender<bool>) {
    site.drain();
    let _ = close_public.send(true); // nobody listens: every connection is closed already
    if tokio::time::timeout(within, site.live.emptied()).await.is_err() {
        log::warn!("{} requests still run after {within:?}; they are cut", site.live.running());
        site.live.cut_all(Cut::Shutdown);
        let _ = tokio::time::timeout(AFTER_CUT, site.live.emptied()).await;
    }
    let closing = Arc::clone(site);
    match tokio::task::spawn_blocking(move || closing.ledger.audit.close(LAST_RECORDS)).await {
        Ok(Ok(())) => {}
        Ok(Err(e)) => log::error!("the last audit records may be missing: {}", e.as_str()),
        Err(e) => log::error!("the last audit records may be missing: {e}"),
    }
}
