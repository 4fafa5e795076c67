//! Payments whose connection hears nothing any more: they are given up, not waited for.

use std::time::Duration;

use handfast_producer::Producer;
use handfast_producer::proto::v1::MessageState;
use handfast_scratch::Scratch;
use payment::pay::Payments;
use payment::store::{Records as _, State, Store};
use payment::{job, open_accounts};
use sqlx::Postgres;
use tokio::time::timeout;

use crate::database::Kind as _;
use crate::order;
use crate::proxy::Proxy;
use crate::scripted::{PATIENCE, Scripted};

/// Long enough for what is answered.
const GIVE_UP_AFTER: Duration = Duration::from_secs(3);

struct Shop {
    handfast: Scripted,
    proxy: Proxy,
    store: Store<Postgres>,
    payments: Payments<Store<Postgres>>,
    _scratch: Scratch,
}

impl Shop {
    /// With an order that is due.
    async fn new() -> Self {
        let handfast = Scripted::start().await;
        let scratch = Postgres::home().await;
        let ann = [("ann".to_owned(), 1_000)];
        open_accounts(&Postgres::database(&scratch), ann)
            .await
            .unwrap();
        let proxy = Proxy::before(&scratch.options()).await;
        let options = proxy.options(scratch.options());
        let store = Store::<Postgres>::open(&options).await.unwrap();
        let producer = Producer::connect(&handfast.url, "payment")
            .await
            .unwrap()
            .with_deadline(GIVE_UP_AFTER);
        let payments =
            Payments::new(store.clone(), producer, Duration::ZERO).giving_up_after(GIVE_UP_AFTER);
        payments.accept(&order("1"), "ann", 300).await.unwrap();
        Self {
            handfast,
            proxy,
            store,
            payments,
            _scratch: scratch,
        }
    }

    /// Takes every place of the pool at once.
    async fn every_place_is_free(&self) {
        let mut places = Vec::new();
        for _ in 0..self.store.writer().options().get_max_connections() {
            places.push(self.store.writer().acquire().await.unwrap());
        }
    }
}

#[tokio::test]
async fn an_order_that_hangs_is_given_up_and_finished_by_the_job() {
    // Our own statement, the begin of the business, and the business.
    for hangs in ["INTO pay_try", "BEGIN; SET LOCAL", "INTO pay_done"] {
        let shop = Shop::new().await;
        shop.proxy.swallow(hangs, 1);
        let finished = timeout(PATIENCE, shop.payments.finish(&order("1"))).await;
        assert_eq!(finished.unwrap().unwrap(), State::Paying, "{hangs}");
        shop.proxy.until_silent(1).await;
        shop.every_place_is_free().await;
        // What Handfast finds out by its check.
        let prepared = shop.handfast.state().prepared.clone();
        for id in prepared {
            shop.handfast.set(id, MessageState::Cancelled);
        }
        assert_eq!(job::run_once(&shop.payments).await.unwrap(), 1);
        let state = shop.payments.finish(&order("1")).await.unwrap();
        assert_eq!(state, State::Paid, "{hangs}");
    }
}

#[tokio::test]
async fn a_job_that_is_not_answered_comes_back_and_finds_the_order_later() {
    let shop = Shop::new().await;
    shop.proxy.swallow("SELECT EXISTS", 1);
    let ran = timeout(PATIENCE, job::run_once(&shop.payments)).await;
    assert!(ran.unwrap().is_err());
    shop.every_place_is_free().await;
    assert_eq!(job::run_once(&shop.payments).await.unwrap(), 1);
}
